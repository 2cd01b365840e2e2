"""A bundle as one HTML page: where the time goes, what was chosen over what, what comes next."""
