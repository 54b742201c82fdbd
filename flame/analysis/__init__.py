"""What attention does in trained models, measured, written as records, and drawn: `flame.analyze` on the command line."""
