"""Every answer of the contract, asked for over HTTP, subject by subject."""
