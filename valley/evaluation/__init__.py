"""How good a trained model is: questions with known answers, and the share it gets right."""
