"""What became of a run, on one self-contained HTML page, from its files alone; nothing here trains or evaluates."""
