def workloads(): return {}
