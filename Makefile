# Short names for the scripts, which do all the work and their own set-up; nothing here needs make.
.PHONY: demo demo-cloudstack test bench bench-store vm-test report-test soak simulate setup clean

demo demo-cloudstack test bench bench-store vm-test report-test setup:
	@script/$@

# make soak MINUTES=10 SEED=1
soak:
	@script/soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

# make simulate SEEDS=1000, or SEED=17, or MINUTES=10
simulate:
	@script/simulate $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
