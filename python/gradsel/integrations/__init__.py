"""What other libraries do to models and their files; each is imported only when something of it turns up."""
