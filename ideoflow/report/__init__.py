"""What a run leaves to be read: ``metrics.jsonl`` while it goes on, ``report.html`` at its end."""
