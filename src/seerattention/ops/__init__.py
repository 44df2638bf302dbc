"""Operations with several backends: one folder per op, one file per backend.

A folder's ``__init__`` holds the public function and its contract, ``reference.py`` the specification
in plain PyTorch. Every backend says by ``unsupported(...)`` why it cannot run something; an empty list
means that it can. That one declaration drives dispatch, error messages, tests and ``info``.
"""
