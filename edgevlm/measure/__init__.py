"""Time candidates against each other: own processes, turns, raw samples, an interval and a verdict."""
