"""What every training shares: which pictures and which rate a step has, what is written down, where it goes on."""
