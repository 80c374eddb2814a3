"""Rules: how updates become the next arrays; one file adapts any rule to Flower and back."""
