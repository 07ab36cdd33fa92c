"""Magistral Small on Apple silicon."""
