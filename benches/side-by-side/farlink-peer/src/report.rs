//! The lines that every peer prints: samples of a metric, or a fact that is no number. `driver.py` pools them.

use serde_json::json;

/// Prints what one peer measures.
pub(crate) struct Report {
    peer: String,
}

impl Report {
    pub(crate) fn new(peer: &str) -> Self {
        Self { peer: peer.to_owned() }
    }

    /// Prints samples of a metric, if there are any.
    pub(crate) fn samples(&self, workload: &str, metric: &str, unit: &str, samples: &[f64]) {
        if !samples.is_empty() {
            let peer = &self.peer;
            let line = json!({"peer": peer, "workload": workload, "metric": metric, "unit": unit, "samples": samples});
            println!("{line}");
        }
    }

    /// Prints durations in nanoseconds.
    pub(crate) fn times(&self, workload: &str, metric: &str, samples: &[f64]) {
        self.samples(workload, metric, "ns", samples);
    }

    /// Prints a metric that is measured once.
    pub(crate) fn one(&self, workload: &str, metric: &str, unit: &str, value: f64) {
        self.samples(workload, metric, unit, &[value]);
    }

    pub(crate) fn fact(&self, workload: &str, fact: &str, text: &str) {
        println!("{}", json!({"peer": self.peer, "workload": workload, "fact": fact, "text": text}));
    }
}
