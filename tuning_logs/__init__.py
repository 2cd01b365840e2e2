"""Tuning records and the models learned from them."""
