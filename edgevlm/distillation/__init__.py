"""Teaching a small model what a large one knows: students, objectives, stored teacher outputs, the trainer."""
