"""The operators' dashboard, subject by subject."""
