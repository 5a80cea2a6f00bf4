package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are what /metrics shows, beside the Go runtime's and the process's own.
type metrics struct {
	registry *prometheus.Registry
	passes   *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	apply    prometheus.Histogram
	failures prometheus.Counter
	drifts   *prometheus.CounterVec
	renewals *prometheus.CounterVec
	handed   prometheus.Counter
	swept    prometheus.Counter
}

func newMetrics(d *Daemon) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		passes:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "twill_passes_total", Help: "Passes of the reconcile loop; kind full reads the kernel, kind store follows the leases alone."}, []string{"kind"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "twill_pass_seconds", Help: "Duration of a pass.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
		}, []string{"kind"}),
		apply: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "twill_apply_seconds", Help: "Time a pass spent writing to the kernel.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 12),
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "twill_failures_total", Help: "Changes that the kernel refused."}),
		drifts:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "twill_drifts_total", Help: "Objects of Twill's that somebody else changed and Twill repaired."}, []string{"kind"}),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "twill_lease_renewals_total", Help: "Renewals of this node's lease."}, []string{"result"}),
		handed:   prometheus.NewCounter(prometheus.CounterOpts{Name: "twill_pods_handed_over_total", Help: "Pods whose links the CNI plugin has handed over to be deleted."}),
		swept:    prometheus.NewCounter(prometheus.CounterOpts{Name: "twill_swept_total", Help: "Attachments, addresses and rules of dead pods that nobody had called DEL for, and host ports restored."}),
	}
	m.registry.MustRegister(
		m.passes, m.seconds, m.apply, m.failures, m.drifts, m.renewals, m.handed, m.swept,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "twill_build_info", Help: "1, with the version as a label.",
			ConstLabels: prometheus.Labels{"version": d.version},
		}, func() float64 { return 1 }),
	)
	for name, g := range map[string]struct {
		help  string
		value func() float64
	}{
		"twill_ready":           {"1 if pods can be connected.", func() float64 { return number(d.unready() == nil) }},
		"twill_store_connected": {"1 if the lease store answers.", func() float64 { return number(d.store.Status().Connected) }},
		"twill_store_revision":  {"Revision of the last Snapshot.", func() float64 { return float64(d.store.Status().Revision) }},
		"twill_leases": {"Leases in the last Snapshot, this node's included.", func() float64 {
			if s := d.snapshot.Load(); s != nil {
				return float64(len(s.Leases))
			}
			return 0
		}},
		"twill_problems": {"Problems that netctl status lists.", func() float64 { return float64(len(d.Status().Problems)) }},
	} {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: g.help}, g.value))
	}
	return m
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) pass(full bool, took time.Duration, failures int) {
	kind := "store"
	if full {
		kind = "full"
	}
	m.passes.WithLabelValues(kind).Inc()
	m.seconds.WithLabelValues(kind).Observe(took.Seconds())
	m.failures.Add(float64(failures))
}

func (m *metrics) drift(kind string) { m.drifts.WithLabelValues(kind).Inc() }

func (m *metrics) renewal(err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.renewals.WithLabelValues(result).Inc()
}
