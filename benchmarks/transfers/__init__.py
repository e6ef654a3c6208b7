"""Two real transfers that fit a CPU: what each method gives, with a tuned learning rate and several seeds."""
