"""What every request passes on its way in: connections, parsing, errors, logs."""
