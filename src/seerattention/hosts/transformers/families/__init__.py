"""One file per model family, named by ``model_type``: where q and k before the rotary embedding are."""
