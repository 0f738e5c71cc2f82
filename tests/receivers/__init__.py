"""Receivers to try the conformance kit on: a sound one, one for each fault, the kind most guides end at."""
