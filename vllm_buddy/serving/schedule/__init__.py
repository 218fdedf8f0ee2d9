"""Routing in vLLM's scheduler: the plan of each step, prefix caching, outcome and metrics."""

# What vLLM's SchedulerConfig.scheduler_cls is set to; vLLM imports it in the engine's process.
SCHEDULER = "vllm_buddy.serving.schedule.scheduler.make_scheduler"
