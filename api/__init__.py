"""The Kamiyo API, under the names its integration guide uses."""
