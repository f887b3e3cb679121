"""Readers: from files and data sets of other people's making to dialogues."""
