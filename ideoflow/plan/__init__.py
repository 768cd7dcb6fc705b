"""Plans: what fits, how long it takes and why, decided before anything heavy is loaded."""
