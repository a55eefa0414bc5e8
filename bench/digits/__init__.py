"""Programs that train the digits model and its judge, learn routers for it, and compare all finders on it."""
