"""What a classifier of the user's own says of images. torch; knows no dataset files, no processes."""
