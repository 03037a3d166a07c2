"""One run from arguments to report, and using what it saved."""
