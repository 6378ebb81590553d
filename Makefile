# Short names for the scripts, which do all the work and their own set-up; nothing here needs make.
.PHONY: demo demo-cloudstack test bench bench-store vm-test report-test soak setup clean

demo demo-cloudstack test bench bench-store vm-test report-test setup:
	@script/$@

# make soak MINUTES=10 SEED=1
soak:
	@script/soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
