"""The coordinator: round state machine, cohort, checkpoint, report, Flower ServerApp."""
