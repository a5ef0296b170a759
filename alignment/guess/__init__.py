"""What a model that nobody described is: every guess with its evidence, and what has to be asked for."""
