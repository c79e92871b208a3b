"""Cleaning: rules.py mends, drops and warns pair by pair, duplicates.py compares rows with each
other, text.py is what both read texts with; cleaner.py names, orders and applies the rules."""
