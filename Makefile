# Short names for the scripts, which do all the work and their own set-up; nothing here needs make.
.PHONY: demo test bench setup clean

demo test bench setup:
	@script/$@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
