//! A JSON document with its members in the order they were written, which a map forgets.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// Any document.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
pub(crate) enum Ordered {
    Object(Members),
    Array(Vec<Ordered>),
    Scalar(Value),
}

/// An object's members.
#[derive(Debug)]
pub(crate) struct Members(Vec<(String, Ordered)>);

impl Ordered {
    pub(crate) fn read(text: &str) -> Ordered {
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The names of an object's members.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let Ordered::Object(members) = self else { panic!("no object: {self:?}") };
        members.0.iter().map(|(key, _)| key.as_str()).collect()
    }

    /// The rows of an array that is a member.
    pub(crate) fn rows(&self, member: &str) -> &[Ordered] {
        let Ordered::Object(members) = self else { panic!("no object: {self:?}") };
        match members.0.iter().find(|(key, _)| key == member) {
            Some((_, Ordered::Array(rows))) => rows,
            other => panic!("{member}: {other:?}"),
        }
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}
