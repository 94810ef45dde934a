"""The tiny pipeline and the teacher, and the commands that trained them."""
