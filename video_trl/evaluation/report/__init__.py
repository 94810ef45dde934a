"""Compare evaluated runs, and write the page that shows them."""
