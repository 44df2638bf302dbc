"""Device functions of the backends beside this folder, which start them."""
