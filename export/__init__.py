"""SavedModels that take raw data, their model cards, and the clients that call them."""
