//! Reading JSON that others write: what is known is taken out, and what is left over is told, not refused.

use serde_json::{Map, Value};

/// An object whose fields are taken out one by one.
#[derive(Debug)]
pub struct Fields<'a> {
    path: String,
    left: Map<String, Value>,
    warnings: &'a mut Vec<String>,
}

impl<'a> Fields<'a> {
    /// The object `value`, found at `path`; empty, with a warning, where it is none.
    pub fn of(path: &str, value: Value, warnings: &'a mut Vec<String>) -> Self {
        let left = match value {
            Value::Object(left) => left,
            Value::Null => Map::new(),
            _ => {
                warnings.push(format!("{path} is no object"));
                Map::new()
            }
        };
        Self { path: path.to_owned(), left, warnings }
    }

    /// The object in a field.
    pub fn object(&mut self, name: &str) -> Fields<'_> {
        let value = self.left.remove(name).unwrap_or_default();
        Fields::of(&format!("{}{name}.", self.path), value, self.warnings)
    }

    /// The objects in a list.
    pub fn each(&mut self, name: &str, mut visit: impl FnMut(&mut Fields<'_>)) {
        let items = match self.left.remove(name) {
            None | Some(Value::Null) => return,
            Some(Value::Array(items)) => items,
            Some(_) => return self.wrong(name, "a list"),
        };
        for (index, item) in items.into_iter().enumerate() {
            let mut fields = Fields::of(&format!("{}{name}[{index}].", self.path), item, self.warnings);
            visit(&mut fields);
            fields.end();
        }
    }

    /// A text that is not empty.
    pub fn text(&mut self, name: &str) -> Option<String> {
        match self.left.remove(name)? {
            Value::String(text) => (!text.is_empty()).then_some(text),
            Value::Null => None,
            _ => {
                self.wrong(name, "a text");
                None
            }
        }
    }

    /// A list of texts.
    pub fn texts(&mut self, name: &str) -> Vec<String> {
        match self.left.remove(name) {
            Some(Value::Array(items)) => {
                items.into_iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
            }
            None | Some(Value::Null) => Vec::new(),
            Some(_) => {
                self.wrong(name, "a list");
                Vec::new()
            }
        }
    }

    /// An object of texts.
    pub fn map(&mut self, name: &str) -> Vec<(String, String)> {
        match self.left.remove(name) {
            Some(Value::Object(map)) => {
                map.into_iter().filter_map(|(k, v)| Some((k, v.as_str()?.to_owned()))).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Yes or no.
    pub fn flag(&mut self, name: &str) -> Option<bool> {
        match self.left.remove(name)? {
            Value::Bool(flag) => Some(flag),
            Value::Null => None,
            _ => {
                self.wrong(name, "true or false");
                None
            }
        }
    }

    /// A number from 0.
    pub fn number(&mut self, name: &str) -> Option<u64> {
        let value = self.left.remove(name)?;
        let number = value.as_u64();
        if number.is_none() && !value.is_null() {
            self.wrong(name, "a number");
        }
        number
    }

    /// Takes fields out that mean nothing here, without a word: they are the daemon's own affairs.
    pub fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.left.remove(*name);
        }
    }

    /// A warning of this object's.
    pub fn warn(&mut self, name: &str, what: &str) {
        self.warnings.push(format!("{}{name} {what}", self.path));
    }

    fn wrong(&mut self, name: &str, wanted: &str) {
        self.warn(name, &format!("is not {wanted}: left out"));
    }

    /// Names what is left over.
    pub fn end(self) {
        for name in self.left.keys() {
            self.warnings.push(format!("{}{name} is unknown: left out", self.path));
        }
    }
}
