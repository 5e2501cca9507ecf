"""The trainers of the two methods and what they are made of."""
