"""Tasks with answers, methods side by side, dense first; resumable, with a summary and a page."""
