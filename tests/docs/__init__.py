"""The documents are true: what they show runs, what they name exists, and what is generated is current."""
