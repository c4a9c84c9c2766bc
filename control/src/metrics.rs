//! Numbers for Prometheus, as typed families that render to its text format, version 0.0.4.
//!
//! The handler gives the families; `GET /metrics` renders them. The format and its escaping rules:
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::fmt::{self, Write};

/// The media type of the text format.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The name of a metric or of a label: letters, digits and underscores, not beginning with a digit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MetricName(&'static str);

impl MetricName {
    /// The name. Meant for constants: a wrong name then fails to compile.
    ///
    /// # Panics
    /// If `name` is not a valid name.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        let bytes = name.as_bytes();
        assert!(!bytes.is_empty() && !bytes[0].is_ascii_digit(), "a metric's name begins with a letter");
        let mut at = 0;
        while at < bytes.len() {
            assert!(
                bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_',
                "a metric's name has letters, digits and _"
            );
            at += 1;
        }
        Self(name)
    }
}

/// Whether a number only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Grows only. By convention its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// A whole number, written in full.
    Integer(u64),
    /// Any number, infinities and "not a number" included.
    Float(f64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) if number.is_nan() => f.write_str("NaN"),
            Self::Float(number) if number.is_infinite() => f.write_str(if *number > 0.0 { "+Inf" } else { "-Inf" }),
            Self::Float(number) => write!(f, "{number}"),
        }
    }
}

/// A label of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: MetricName,
    /// Its value; any text.
    pub value: String,
}

/// One number of a family.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What tells it from the other samples of the family.
    pub labels: Vec<Label>,
    /// The number.
    pub value: Value,
}

/// Samples of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// The name.
    pub name: MetricName,
    /// What it means, for people.
    pub help: &'static str,
    /// Whether it only grows.
    pub kind: MetricKind,
    /// The numbers.
    pub samples: Vec<Sample>,
}

/// All metrics of a VM at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// The families, in the order in which they are shown.
    pub families: Vec<Family>,
}

impl Metrics {
    /// Adds a family of one sample without labels.
    pub fn push(&mut self, name: MetricName, kind: MetricKind, help: &'static str, value: Value) {
        self.families.push(Family { name, help, kind, samples: vec![Sample { labels: Vec::new(), value }] });
    }

    /// The text for Prometheus.
    #[must_use]
    pub fn render(&self) -> String {
        self.families.iter().fold(String::new(), |text, family| text + &family.to_string())
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        writeln!(f, "# HELP {} {}", self.name.0, Escaped { text: self.help, quotes: false })?;
        writeln!(f, "# TYPE {} {kind}", self.name.0)?;
        for sample in &self.samples {
            f.write_str(self.name.0)?;
            for (at, label) in sample.labels.iter().enumerate() {
                let before = if at == 0 { '{' } else { ',' };
                write!(f, "{before}{}=\"{}\"", label.name.0, Escaped { text: &label.value, quotes: true })?;
            }
            writeln!(f, "{} {}", if sample.labels.is_empty() { "" } else { "}" }, sample.value)?;
        }
        Ok(())
    }
}

/// A text with backslashes and line feeds escaped, and with quotation marks too inside a label.
struct Escaped<'a> {
    text: &'a str,
    quotes: bool,
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.chars().try_for_each(|letter| match letter {
            '\\' => f.write_str("\\\\"),
            '\n' => f.write_str("\\n"),
            '"' if self.quotes => f.write_str("\\\""),
            other => f.write_char(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXITS: MetricName = MetricName::new("godwit_vcpu_exits_total");
    const VCPU: MetricName = MetricName::new("vcpu");
    const WHY: MetricName = MetricName::new("why");

    fn sample(labels: &[(MetricName, &str)], value: Value) -> Sample {
        let labels = labels.iter().map(|&(name, value)| Label { name, value: value.to_owned() }).collect();
        Sample { labels, value }
    }

    #[test]
    fn renders_the_text_format() {
        let mut metrics = Metrics::default();
        metrics.families.push(Family {
            name: EXITS,
            help: "Exits of vCPUs",
            kind: MetricKind::Counter,
            samples: vec![
                sample(&[(VCPU, "0"), (WHY, "io")], Value::Integer(u64::MAX)),
                sample(&[(VCPU, "1"), (WHY, "mmio")], Value::Integer(0)),
            ],
        });
        metrics.push(
            MetricName::new("godwit_paused"),
            MetricKind::Gauge,
            "1 while the guest is paused",
            Value::Integer(1),
        );
        let expected = "# HELP godwit_vcpu_exits_total Exits of vCPUs\n\
             # TYPE godwit_vcpu_exits_total counter\n\
             godwit_vcpu_exits_total{vcpu=\"0\",why=\"io\"} 18446744073709551615\n\
             godwit_vcpu_exits_total{vcpu=\"1\",why=\"mmio\"} 0\n\
             # HELP godwit_paused 1 while the guest is paused\n\
             # TYPE godwit_paused gauge\n\
             godwit_paused 1\n";
        assert_eq!(metrics.render(), expected);
    }

    #[test]
    fn escapes_where_the_format_asks_for_it() {
        let family = Family {
            name: EXITS,
            help: "A \\ and a\nline, \"quoted\"",
            kind: MetricKind::Gauge,
            samples: vec![sample(&[(WHY, "C:\\x\n\"y\" ü")], Value::Float(0.5))],
        };
        let text = family.to_string();
        assert!(text.starts_with("# HELP godwit_vcpu_exits_total A \\\\ and a\\nline, \"quoted\"\n"), "{text}");
        assert!(text.contains("{why=\"C:\\\\x\\n\\\"y\\\" ü\"} 0.5\n"), "{text}");
    }

    #[test]
    fn every_float_has_a_text() {
        for (number, text) in
            [(f64::NAN, "NaN"), (f64::INFINITY, "+Inf"), (f64::NEG_INFINITY, "-Inf"), (-0.25, "-0.25"), (3.0, "3")]
        {
            assert_eq!(Value::Float(number).to_string(), text);
        }
    }

    #[test]
    fn a_wrong_name_is_caught() {
        for name in ["", "9lives", "a-b", "ü"] {
            assert!(std::panic::catch_unwind(|| MetricName::new(name)).is_err(), "{name:?}");
        }
        assert_eq!(Metrics::default().render(), "");
    }
}
