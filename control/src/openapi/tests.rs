//! Holds `openapi.json` against the table of routes and against the types, in both directions.

use crate::routes::{BodyRule, Content, ROUTES};
use crate::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

fn schemas() -> Map<String, Value> {
    document()["components"]["schemas"].as_object().unwrap().clone()
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// Reads JSON as a type and writes it again.
type Pass = fn(&Value) -> Result<Value, String>;

fn pass<T: Serialize + DeserializeOwned>(value: &Value) -> Result<Value, String> {
    let typed: T = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    serde_json::to_value(typed).map_err(|error| error.to_string())
}

/// The type behind each schema.
fn types() -> BTreeMap<&'static str, Pass> {
    macro_rules! types {
        ($($name:ident)*) => { BTreeMap::from([$((stringify!($name), pass::<$name> as Pass)),*]) };
    }
    types! {
        VmInfo Phase DirtyTrackerKind Stop BalloonInfo SetBalloon DiskList DiskInfo ResizeDisk DiskBefore DiskCounters DiskPolicy WithDisks NicList NicInfo
        NicBackend NicCounters StartMigration PeerAddress OnStall MigrationMode MemoryPolicy MemoryTransfer MigrationRole MigrationState
        MigrationStep JobStarted LastMigration MigrationStatus Progress RoundInfo RoundCodecs CodecReason RoundKinds StepInfo SwitchReason GuestCost CpuTimes TargetPart
        ResolveMigration Owner Pulse Pulsed Happening Event
        EndReason MeasureDirtyRate LastDirtyRate MeasurementStatus MeasurementState DirtyRate MemorySample MeasurementCost ErrorBody Code
    }
}

/// Checks a value against the part of JSON Schema that the document uses; panics at a part that it does not know.
/// Stricter than the standard: a field without a description is an error everywhere.
fn check(schema: &Value, value: &Value) -> Result<(), String> {
    for (key, rule) in schema.as_object().unwrap() {
        let holds = match key.as_str() {
            "description" | "default" | "examples" | "format" | "pattern" => true,
            "$ref" => {
                let name = rule.as_str().unwrap().strip_prefix("#/components/schemas/").unwrap();
                check(schemas().get(name).unwrap_or_else(|| panic!("no schema {name}")), value)?;
                true
            }
            "type" => match rule.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "integer" => value.is_u64() || value.is_i64(),
                "number" => value.is_number(),
                other => panic!("unknown type {other}"),
            },
            "minimum" => value.as_f64() >= rule.as_f64(),
            "maximum" => value.as_f64() <= rule.as_f64(),
            "const" => value == rule,
            "enum" => rule.as_array().unwrap().contains(value),
            "required" => rule.as_array().unwrap().iter().all(|name| value.get(name.as_str().unwrap()).is_some()),
            "items" => value.as_array().into_iter().flatten().try_for_each(|item| check(rule, item)).map(|()| true)?,
            "oneOf" => rule.as_array().unwrap().iter().filter(|one| check(one, value).is_ok()).count() == 1,
            "properties" => {
                for (name, field) in value.as_object().into_iter().flatten() {
                    check(rule.get(name).ok_or_else(|| format!("field {name} is not described"))?, field)?;
                }
                true
            }
            "additionalProperties" => match (rule, value.as_object()) {
                (Value::Bool(false), _) => true,
                (rule, fields) => {
                    fields.into_iter().flatten().try_for_each(|(_, field)| check(rule, field)).map(|()| true)?
                }
            },
            other => panic!("unknown keyword {other}"),
        };
        if !holds {
            return Err(format!("{value} breaks {key}: {rule}"));
        }
    }
    Ok(())
}

#[test]
fn every_route_is_described_and_nothing_else() {
    let document = document();
    assert_eq!((&document["openapi"], &document["info"]["version"]), (&json!("3.1.0"), &json!(API_VERSION)));
    let described: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let served = ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    assert_eq!(described, served);
}

#[test]
fn every_route_is_described_as_it_is() {
    let document = document();
    for route in &ROUTES {
        let described = &document["paths"][route.path][route.method.as_str().to_lowercase()];
        assert_eq!(described["operationId"], route.operation.name());
        assert_eq!(described["summary"], route.summary);
        let body = match route.body {
            BodyRule::Empty => Value::Null,
            BodyRule::Optional(schema) | BodyRule::Required(schema) => json!({
                "required": matches!(route.body, BodyRule::Required(_)),
                "content": { "application/json": { "schema": reference(schema) } },
            }),
        };
        assert_eq!(described["requestBody"], body, "{}", route.path);
        let content = match route.content {
            Content::Nothing => Value::Null,
            Content::Json(schema) => json!({ "application/json": { "schema": reference(schema) } }),
            Content::Stream(schema) => json!({ "text/event-stream": { "schema": reference(schema) } }),
            Content::Metrics => json!({ "text/plain; version=0.0.4": { "schema": { "type": "string" } } }),
            Content::OpenApi => json!({ "application/json": { "schema": { "type": "object" } } }),
        };
        let responses = described["responses"].as_object().unwrap();
        assert_eq!(responses[&route.status.to_string()]["content"], content, "{}", route.path);
        let statuses: BTreeSet<_> = responses.keys().map(|status| status.parse::<u16>().unwrap()).collect();
        let expected = route.failures.iter().copied().chain([route.status]).collect();
        assert_eq!(statuses, expected, "{} {}", route.method, route.path);
        for status in route.failures {
            let component = responses[&status.to_string()]["$ref"].as_str().unwrap();
            let response = document.pointer(component.strip_prefix('#').unwrap()).unwrap();
            assert_eq!(response["content"]["application/json"]["schema"], reference("ErrorBody"));
        }
    }
}

#[test]
fn every_schema_has_a_type_and_its_examples_are_of_that_type() {
    let (schemas, types) = (schemas(), types());
    assert!(schemas.keys().map(String::as_str).eq(types.keys().copied()), "other schemas than types");
    for (name, schema) in &schemas {
        let examples = schema["examples"].as_array().unwrap();
        assert!(!examples.is_empty() && schema["description"].is_string(), "{name}");
        for example in examples {
            check(schema, example).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(types[name.as_str()](example).as_ref(), Ok(example), "{name}");
        }
    }
}

#[test]
fn what_is_required_is_required_and_the_rest_is_not() {
    for (name, schema) in &schemas() {
        let Some(fields) = schema["properties"].as_object() else { continue };
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        let mut shown = BTreeSet::new();
        for example in schema["examples"].as_array().unwrap() {
            for field in example.as_object().unwrap().keys() {
                shown.insert(field.clone());
                let mut shorter = example.clone();
                shorter.as_object_mut().unwrap().remove(field);
                let parsed = types()[name.as_str()](&shorter);
                assert_eq!(parsed.is_err(), required.contains(&json!(field)), "{name}.{field}");
            }
        }
        assert!(shown.iter().eq(fields.keys().collect::<BTreeSet<_>>()), "{name}: no example shows every field");
    }
}

#[test]
fn bodies_of_requests_are_strict_and_replies_are_not() {
    let bodies: BTreeSet<&str> = ROUTES
        .iter()
        .filter_map(|route| match route.body {
            BodyRule::Empty => None,
            BodyRule::Optional(schema) | BodyRule::Required(schema) => Some(schema),
        })
        .collect();
    for (name, schema) in schemas().iter().filter(|(_, schema)| schema["properties"].is_object()) {
        let mut wider = schema["examples"][0].clone();
        wider["surprise"] = json!(1);
        let strict = bodies.contains(name.as_str());
        assert_eq!(schema["additionalProperties"] == json!(false), strict, "{name}");
        match types()[name.as_str()](&wider) {
            Ok(_) => assert!(!strict, "{name}"),
            Err(error) => assert!(strict && error.contains("unknown field `surprise`"), "{name}: {error}"),
        }
    }
}

#[test]
fn every_variant_is_described() {
    for (name, schema) in &schemas() {
        let described: BTreeSet<String> = match (&schema["enum"], &schema["oneOf"]) {
            (Value::Array(values), _) => values.iter().map(|value| value.as_str().unwrap().to_owned()).collect(),
            (_, Value::Array(values)) if values.iter().all(|one| one["properties"]["type"].is_object()) => {
                values.iter().map(|one| one["properties"]["type"]["const"].as_str().unwrap().to_owned()).collect()
            }
            _ => continue,
        };
        let typed: BTreeSet<String> = if name == "Code" {
            Code::ALL.iter().map(|code| serde_json::to_value(code).unwrap().as_str().unwrap().to_owned()).collect()
        } else {
            // The error lists all variants, each in backquotes, after the unknown one.
            let unknown = if schema["enum"].is_array() { json!("~") } else { json!({ "type": "~" }) };
            let error = types()[name.as_str()](&unknown).unwrap_err();
            error.split('`').skip(3).step_by(2).map(str::to_owned).collect()
        };
        assert_eq!(typed, described, "{name}");
    }
}

/// Values with every optional field; a field that is added to a type stops this from compiling.
#[test]
fn what_the_types_write_is_described() {
    let schemas = schemas();
    let described = |name: &str, value: Value| check(&schemas[name], &value).unwrap();
    let one = std::num::NonZeroU32::MIN;
    let millis = Some(Millis::from(std::time::Duration::from_micros(1500)));
    let progress = Progress {
        step: MigrationStep::HandOver,
        round: 1,
        pages_sent: 2,
        zero_pages: 1,
        bytes_sent: 4096,
        remaining_bytes: 0,
        bytes_per_second: u64::MAX,
        throttled_percent: Some(99),
        predicted_downtime_ms: millis,
    };
    described("Stop", json!(Stop { force_after_s: Some(one) }));
    let to: PeerAddress = "tcp://[::1]:1".parse().unwrap();
    let start = StartMigration {
        to: to.clone(),
        mode: MigrationMode::Stop,
        max_downtime_ms: one,
        max_rounds: one,
        deadline_ms: Some(one),
        on_stall: OnStall::Throttle,
        bandwidth_bytes_per_second: Some(std::num::NonZeroU64::MIN),
        timeout_s: Some(one),
        verify: true,
        memory: MemoryPolicy::Copy,
        streams: Streams::default(),
        congestion: Some("bbr".to_owned()),
        codec: CodecChoice::default(),
        cpu_budget: Some("0.5".parse().unwrap()),
        delta_cache_bytes: 0,
        with_disks: WithDisks::All(DiskPolicy::After),
    };
    described("StartMigration", json!(start));
    let counters = DiskCounters::default();
    let before = DiskBefore { place: "/d".into(), mean_read_ms: millis, mean_write_ms: millis };
    let disk = DiskInfo {
        id: "blk0".into(),
        place: "/d".into(),
        bytes: 512,
        missing_bytes: Some(0),
        read_only: true,
        counters,
        before: Some(before),
    };
    described("DiskList", json!(DiskList { disks: vec![disk] }));
    let nic = NicInfo {
        id: "net0".into(),
        tap: "tap0".into(),
        mac: "02:00:00:00:00:01".into(),
        backend: NicBackend::Tap,
        counters: Some(NicCounters::default()),
    };
    described("NicList", json!(NicList { nics: vec![nic] }));
    let migration = MigrationStatus {
        job: JobId::random().unwrap(),
        role: MigrationRole::Target,
        peer: to,
        mode: MigrationMode::Live,
        memory: Some(MemoryTransfer::Passed),
        streams: Some(1),
        state: MigrationState::InDoubt,
        progress,
        rounds: Vec::new(),
        steps: vec![StepInfo { step: MigrationStep::Pausing, duration_ms: Millis::default() }],
        total_ms: Millis::default(),
        downtime_ms: millis,
        target_part: Some(TargetPart { restore_ms: Millis::default(), start_ms: Millis::default() }),
        predicted_total_ms: millis,
        switched: Some(SwitchReason::GoalMet),
        stalled_in_round: Some(1),
        guest_cost: Some(GuestCost {
            log_ms: Millis::default(),
            longest_log_ms: Millis::default(),
            throttled_ms: Millis::default(),
            throttled_percent: 1,
            most_percent: 99,
        }),
        cpu: Some(CpuTimes { source_ms: millis, target_ms: millis }),
        verified: Some(true),
        error: Some("The link broke".into()),
    };
    described("LastMigration", json!(LastMigration { migration: Some(migration.clone()) }));
    described("MeasureDirtyRate", json!(MeasureDirtyRate::default()));
    let sample = MemorySample { pages: 3, zero_pages: 1, duplicate_pages: 1, lz4_bytes: 100, zstd_bytes: 90 };
    let length = Millis::default();
    let cost = MeasurementCost { protected_pages: 7, log_ms: length, longest_log_ms: length, cpu_ms: length };
    let found = DirtyRate {
        duration_ms: length,
        pages_per_second: 7,
        bytes_per_second: 28_672,
        working_set_pages: vec![1, 2],
        vcpu_pages_per_second: Some(vec![3, 4]),
        sample,
        cost,
    };
    let measurement = MeasurementStatus {
        job: JobId::random().unwrap(),
        state: MeasurementState::Completed,
        period_ms: length,
        found: Some(found),
        error: Some("The guest was paused".into()),
    };
    described("LastDirtyRate", json!(LastDirtyRate { measurement: Some(measurement.clone()) }));
    described("Happening", json!(Happening::MeasurementEnded { measurement: Box::new(measurement) }));
    let body = ErrorBody { code: Code::TooLate, message: String::new(), phase: Some(Phase::Ended) };
    described("ErrorBody", json!(body));
    let ended = Happening::MigrationEnded { migration: Box::new(migration) };
    assert_eq!(json!(ended)["type"], ended.name());
    described("Event", json!(Event { sequence: 1, at_ms: 0, what: ended }));
}

#[test]
fn the_names_of_events_are_their_types() {
    for example in schemas()["Happening"]["examples"].as_array().unwrap() {
        let happening: Happening = serde_json::from_value(example.clone()).unwrap();
        assert_eq!(example["type"], happening.name());
    }
}

#[test]
fn the_check_itself_can_fail() {
    let schema = &schemas()["Pulse"];
    assert!(check(schema, &json!({ "times": 1 })).is_ok());
    for wrong in [json!({}), json!({ "times": 0 }), json!({ "times": "1" }), json!({ "times": 1, "x": 1 }), json!([])] {
        assert!(check(schema, &wrong).is_err(), "{wrong}");
    }
    assert!(check(&schemas()["Happening"], &json!({ "type": "lagged" })).is_err());
}
