"""What an operator and a browser use: health, figures, the API's documents, the page."""
