//! From an option's base64 to fields, each taken once; what is left over is said by name.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{ImageError, check_path};

/// Longest description, in bytes of base64: far more than a configuration with all its mirrors.
const MAX: usize = 1 << 20;

/// Kinds of volumes, as far as they matter.
pub enum Volume {
    /// Images in the form that the image service serves.
    Nydus,
    /// `direct_block`, `image_raw_block`, `layer_raw_block`, `image_guest_pull`, and what is still to come.
    Other,
}

impl Volume {
    pub fn of(kind: &str) -> Self {
        match kind {
            "image_nydus_block" | "layer_nydus_block" | "image_nydus_fs" | "layer_nydus_fs" => Volume::Nydus,
            _ => Volume::Other,
        }
    }
}

/// The fields of a JSON object.
pub struct Fields {
    option: &'static str,
    fields: Map<String, Value>,
}

impl Fields {
    /// Reads the base64 of a JSON object.
    pub fn decode(option: &'static str, text: &str) -> Result<Self, ImageError> {
        let unreadable = |reason: String| ImageError::Unreadable { option, reason };
        if text.len() > MAX {
            return Err(unreadable(format!("{} bytes long, must have at most {MAX}", text.len())));
        }
        let bytes = base64(text).ok_or_else(|| unreadable("not base64".to_owned()))?;
        // The reason would quote what may be a secret.
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(fields)) => Ok(Fields { option, fields }),
            Ok(_) => Err(unreadable("not a JSON object".to_owned())),
            Err(e) => Err(unreadable(format!("not JSON, at line {} column {}", e.line(), e.column()))),
        }
    }

    /// Takes a field.
    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.fields.remove(field)
    }

    /// Takes a text; none if it is missing, null or empty.
    pub fn text(&mut self, field: &str) -> Result<Option<String>, ImageError> {
        match self.take(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(_) => Err(self.wrong(field, "a text")),
        }
    }

    /// Takes a configuration: JSON in a text, or as it is.
    pub fn config(&mut self, field: &str) -> Result<String, ImageError> {
        match self.take(field) {
            None | Some(Value::Null) => Ok(String::new()),
            Some(Value::String(text)) => Ok(text),
            Some(object @ Value::Object(_)) => Ok(object.to_string()),
            Some(_) => Err(self.wrong(field, "a text or an object")),
        }
    }

    /// Takes a path.
    pub fn path(&mut self, field: &'static str) -> Result<Option<PathBuf>, ImageError> {
        let path = self.text(field)?.map(PathBuf::from);
        path.iter().try_for_each(|path| check_path(field, path))?;
        Ok(path)
    }

    /// Takes an object.
    pub fn object(&mut self, field: &str) -> Result<Option<Fields>, ImageError> {
        match self.take(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Fields { option: self.option, fields })),
            Some(_) => Err(self.wrong(field, "an object")),
        }
    }

    /// A warning for each field that is left.
    pub fn rest(self) -> impl Iterator<Item = String> {
        let option = self.option;
        let unknown = self.fields.into_iter().filter(|(_, value)| !value.is_null());
        unknown.map(move |(field, _)| {
            format!("field {:?} of the image mount's {option} is not known and left out", shortened(&field))
        })
    }

    fn wrong(&self, field: &str, wanted: &str) -> ImageError {
        ImageError::Unreadable { option: self.option, reason: format!("{field:?} is not {wanted}") }
    }
}

/// A name that a log line can hold.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// Bytes of standard base64 (RFC 4648, 4), with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim().trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut bits = 0_u32;
        for digit in group {
            bits = bits << 6 | u32::from(value(*digit)?);
        }
        let count = match group.len() {
            4 => 3,
            3 => 2,
            2 => 1,
            _ => return None,
        };
        bits <<= 6 * (4 - group.len());
        bytes.extend(&bits.to_be_bytes()[1..=count]);
    }
    Some(bytes)
}

fn value(digit: u8) -> Option<u8> {
    match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        // RFC 4648, 10.
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmFy", "foobar"),
        ] {
            assert_eq!(base64(text).unwrap(), bytes.as_bytes());
            assert_eq!(base64(text.trim_end_matches('=')).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64("+/8="), Some(vec![0xfb, 0xff]));
        for text in ["Z", "Zm9vY", "Zm9v!", "Zm=9", "Zm_9"] {
            assert_eq!(base64(text), None, "{text}");
        }
    }
}
