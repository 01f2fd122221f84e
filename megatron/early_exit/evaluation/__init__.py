"""What exits cost in quality and gain in speed: measurements, their records, and reports."""
