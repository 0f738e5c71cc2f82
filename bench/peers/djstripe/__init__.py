"""dj-stripe, from pip: a Django project around it, in an environment of its own, and a stub of the Stripe API."""

#: The endpoint's address and the API key; both guard nothing.
ENDPOINT = "8f2a6a52-5d0e-4c1c-9b5f-2a9d3b7c1e40"
KEY = "sk_test_" + "benchmark" * 3
