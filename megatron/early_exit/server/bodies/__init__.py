"""What bodies of requests and answers of all protocols have in common."""
