//! The table of efforts, who wins over whom, and what contradicts.

use locket_processor::reasoning::ReasoningSettings;
use serde_json::json;

use super::*;

fn profile() -> ReasoningProfile {
    let settings = ReasoningSettings { open: Some("<think>".into()), ..ReasoningSettings::default() };
    ReasoningProfile::resolve(&settings, None).expect("valid").expect("a profile")
}

fn reasoning(switches: TemplateSwitches) -> Reasoning {
    Reasoning {
        profile: Some(Arc::new(profile())),
        switches,
        mode: None,
        budget: Some(4096),
        marker_ids: Arc::default(),
    }
}

fn read(body: Value) -> Result<ReasoningFields, ApiError> {
    let mut fields = ReasoningFields::default();
    Field::root(&body).entries(|name, field| {
        assert!(fields.read(name, &field, &mut IgnoredFields::default())?, "{name}");
        Ok(())
    })?;
    fields.check_together()?;
    Ok(fields)
}

fn decide(reasoning: &Reasoning, body: Value, kwargs: Value) -> Result<(ReasoningChoice, Value), ApiError> {
    let Value::Object(mut kwargs) = kwargs else { panic!("an object") };
    let choice = reasoning.decide(&read(body)?, &mut kwargs)?;
    Ok((choice, kwargs.into()))
}

/// The table of the specification, budgets within an answer of 10,000 tokens.
#[test]
fn efforts() {
    use ReasoningMode::{Auto, Fast, Slow};
    let rows = [
        ("none", Fast, Some(0)),
        ("minimal", Slow, Some(256)),
        ("low", Slow, Some(1_024)),
        ("medium", Auto, Some(4_096)),
        ("high", Slow, Some(10_000 - 64)),
        ("xhigh", Slow, None),
        ("max", Slow, None),
    ];
    assert_eq!(rows.map(|row| row.0), EFFORTS);
    for (effort, mode, budget) in rows {
        let reasoning = reasoning(TemplateSwitches::default());
        let (choice, kwargs) =
            decide(&reasoning, json!({"reasoning_effort": effort}), json!({})).expect("good");
        assert_eq!((choice.mode, choice.budget.within(10_000)), (Some(mode), budget), "{effort}");
        assert_eq!(kwargs, json!({}), "the template has no switch");
        assert_eq!(choice.for_prompt().expect("a profile").1, Some(mode));
    }
}

#[test]
fn budgets_that_nobody_named_leave_room_for_the_answer() {
    let usual = Budget { tokens: Some(4096), is_fixed: false };
    assert_eq!([1000, 128, 100, 1].map(|max| usual.within(max)), [Some(936), Some(64), Some(50), Some(0)]);
    assert_eq!(Budget { is_fixed: true, ..usual }.within(5), Some(4096));
    assert_eq!(Budget::default().within(5), None);
}

#[test]
fn the_first_that_speaks_wins() {
    use ReasoningMode::{Auto, Fast, Slow};
    let all = json!({"reasoning_effort": "high", "thinking": {"type": "disabled"}});
    let rows = [
        (all, json!({"thinking": true}), Some(Fast), Some(0)),
        (json!({"reasoning_effort": "low"}), json!({"enable_thinking": false}), Some(Fast), Some(0)),
        (json!({"reasoning_effort": "low"}), json!({"thinking": true}), Some(Slow), Some(936)),
        (json!({"thinking_token_budget": 0}), json!({"thinking": true}), Some(Fast), Some(0)),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 0}}), json!({}), Some(Slow), Some(0)),
        (json!({"thinking": {"type": "auto", "budget_tokens": 5000}}), json!({}), Some(Auto), Some(5000)),
        (json!({"reasoning_effort": "low", "thinking_token_budget": 9}), json!({}), Some(Slow), Some(9)),
        (json!({}), json!({"x": 1}), None, Some(936)),
    ];
    for (body, kwargs, mode, budget) in rows {
        let (choice, _) =
            decide(&reasoning(TemplateSwitches::default()), body.clone(), kwargs).expect("good");
        assert_eq!((choice.mode, choice.budget.within(1000)), (mode, budget), "{body}");
    }
}

/// A template that has switches is told, and nothing is forced.
#[test]
fn templates_are_told() {
    let switches = TemplateSwitches { enable_thinking: true, reasoning_effort: true, ..Default::default() };
    let reasoning = reasoning(switches);
    let rows = [
        (
            json!({"reasoning_effort": "none"}),
            json!({}),
            json!({"enable_thinking": false, "reasoning_effort": "none"}),
        ),
        (
            json!({"thinking": {"type": "enabled"}}),
            json!({"enable_thinking": false}),
            json!({"enable_thinking": true}),
        ),
        (json!({}), json!({"thinking": false}), json!({"thinking": false, "enable_thinking": false})),
        (json!({"thinking": {"type": "auto"}}), json!({"enable_thinking": false}), json!({})),
        (json!({}), json!({}), json!({})),
    ];
    for (body, kwargs, wanted) in rows {
        let (choice, kwargs) = decide(&reasoning, body.clone(), kwargs).expect("good");
        assert_eq!(kwargs, wanted, "{body}");
        assert_eq!(choice.for_prompt().expect("a profile").1, None);
    }
}

/// An effort is all that some templates know: they are told it, and nothing is forced unless what wins over
/// it says otherwise.
#[test]
fn templates_that_know_efforts_only() {
    use ReasoningMode::{Fast, Slow};
    let switches = TemplateSwitches { reasoning_effort: true, ..Default::default() };
    let reasoning = Reasoning { mode: Some(Slow), ..reasoning(switches) };
    let rows = [
        (json!({"reasoning_effort": "none"}), json!({}), json!("none"), None),
        (json!({"reasoning_effort": "medium"}), json!({}), json!("medium"), None),
        (json!({}), json!({"reasoning_effort": "own"}), json!("own"), None),
        (json!({"reasoning_effort": "low"}), json!({"thinking": true}), json!("low"), None),
        (json!({"reasoning_effort": "low", "thinking_token_budget": 0}), json!({}), json!("low"), Some(Fast)),
        (json!({"reasoning_effort": "none"}), json!({"thinking": true}), json!("none"), Some(Slow)),
        (json!({"thinking": {"type": "disabled"}}), json!({}), Value::Null, Some(Fast)),
        (json!({}), json!({}), Value::Null, Some(Slow)),
    ];
    for (body, kwargs, effort, forced) in rows {
        let (choice, kwargs) = decide(&reasoning, body.clone(), kwargs).expect("good");
        assert_eq!(
            (&kwargs["reasoning_effort"], choice.for_prompt().expect("a profile").1),
            (&effort, forced),
            "{body}"
        );
    }
}

#[test]
fn contradictions_and_bad_values() {
    use ErrorKind::*;
    let off = json!({"type": "disabled"});
    let rows = [
        (json!({"reasoning_effort": "huge"}), InvalidValue, "reasoning_effort"),
        (json!({"thinking": {}}), MissingRequiredParameter, "thinking.type"),
        (json!({"thinking": true}), InvalidType, "thinking"),
        (json!({"thinking": {"type": "on"}}), InvalidValue, "thinking.type"),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": -1}}),
            IntegerBelowMinValue,
            "thinking.budget_tokens",
        ),
        (
            json!({"thinking": {"type": "disabled", "budget_tokens": 5}}),
            InvalidValue,
            "thinking.budget_tokens",
        ),
        (json!({"thinking": off, "thinking_token_budget": 5}), InvalidValue, "thinking_token_budget"),
        (
            json!({"reasoning_effort": "none", "thinking_token_budget": 5}),
            InvalidValue,
            "thinking_token_budget",
        ),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 4}, "thinking_token_budget": 5}),
            InvalidValue,
            "thinking_token_budget",
        ),
    ];
    for (body, kind, param) in rows {
        // Whatever the operator prefers.
        for mode in [None, Some(ReasoningMode::Fast), Some(ReasoningMode::Slow)] {
            let reasoning = Reasoning { mode, ..reasoning(TemplateSwitches::default()) };
            let error = decide(&reasoning, body.clone(), json!({})).expect_err("must fail");
            assert_eq!((error.kind, error.param.as_deref()), (kind, Some(param)), "{body}");
        }
    }
}

/// A budget alone contradicts no preference of the operator.
#[test]
fn budgets_without_a_mode() {
    let reasoning = Reasoning { mode: Some(ReasoningMode::Fast), ..reasoning(TemplateSwitches::default()) };
    let (choice, _) = decide(&reasoning, json!({"thinking_token_budget": 5}), json!({})).expect("good");
    assert_eq!((choice.mode, choice.budget.tokens), (Some(ReasoningMode::Fast), Some(5)));
}

/// Without a profile an effort is a hint; what must have an effect is refused, with the setting's name.
#[test]
fn models_without_thoughts() {
    let none = Reasoning { profile: None, ..reasoning(TemplateSwitches::default()) };
    for body in [
        json!({"reasoning_effort": "high"}),
        json!({"thinking": {"type": "disabled"}}),
        json!({"thinking": {"type": "auto"}}),
        json!({"thinking_token_budget": 0}),
    ] {
        assert!(decide(&none, body.clone(), json!({})).expect("a hint").0.for_prompt().is_none(), "{body}");
    }
    for (body, param) in [
        (json!({"thinking": {"type": "enabled"}}), "thinking"),
        (json!({"thinking": {"type": "auto", "budget_tokens": 9}}), "thinking.budget_tokens"),
        (json!({"thinking_token_budget": 9}), "thinking_token_budget"),
    ] {
        let error = decide(&none, body, json!({})).expect_err("no thoughts");
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::UnsupportedParameter, Some(param)));
        assert!(error.message.contains("reasoning.open"), "{}", error.message);
    }
}
