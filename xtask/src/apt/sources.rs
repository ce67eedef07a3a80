//! Reads apt's source lists: the one-line format and deb822. Pure, but for one function that walks the
//! directory.
//!
//! Knows nothing about what is fetched. It exists so that a private apt state can repeat the machine's own
//! Debian entry (its mirror, its keyring) with other suites.

use anyhow::{Context, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// One enabled binary-package source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// Mirrors, in apt's order.
    pub uris: Vec<String>,
    /// Suites such as `bookworm` and `bookworm-updates`.
    pub suites: Vec<String>,
    /// The value of Signed-By: keyring paths, or an embedded key with its continuation lines.
    pub signed_by: Option<String>,
}

impl Source {
    /// The same mirror and key with other suites, in deb822 format.
    pub(crate) fn with_suites(&self, suites: &[&str]) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            self.uris.join(" "),
            suites.join(" ")
        );
        if let Some(key) = &self.signed_by {
            text += &format!("Signed-By: {key}\n");
        }
        text
    }
}

/// Every source file of the machine, `etc_apt` being its `/etc/apt`, in the order in which apt reads them.
///
/// # Errors
/// Fails when the directory exists and cannot be read.
pub(crate) fn source_files(etc_apt: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let parts = etc_apt.join("sources.list.d");
    match fs::read_dir(&parts) {
        Ok(entries) => {
            for entry in entries {
                files.push(entry?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", parts.display())),
    }
    files.retain(|path| path.extension().is_some_and(|ext| ext == "list" || ext == "sources"));
    files.sort();
    files.insert(0, etc_apt.join("sources.list"));
    files.retain(|path| path.is_file());
    Ok(files)
}

/// The enabled binary sources in `files`; each is decoded by its extension.
///
/// # Errors
/// Fails when a file cannot be read.
pub(crate) fn read(files: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in files {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let deb822 = path.extension().is_some_and(|ext| ext == "sources");
        sources.extend(if deb822 { parse_deb822(&text) } else { parse_one_line(&text) });
    }
    Ok(sources)
}

/// Decodes `deb [options] uri suite component…` lines. Lines that are not that are not for us and are passed
/// over.
fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(|line| one_line(line.split('#').next().unwrap_or_default())).collect()
}

fn one_line(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    Some(Source {
        uris: vec![uri.to_owned()],
        suites: vec![suite.to_owned()],
        signed_by: signed_by.map(|keys| keys.replace(',', " ")),
    })
}

/// Decodes deb822 stanzas: `Field: value` with continuation lines, separated by empty lines, `#` lines
/// ignored.
fn parse_deb822(text: &str) -> Vec<Source> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).filter_map(stanza).collect()
}

fn stanza(lines: &[&str]) -> Option<Source> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        if line.starts_with([' ', '\t']) {
            fields.last_mut()?.1 += &format!("\n{line}");
        } else {
            let (name, value) = line.split_once(':')?;
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let field = |name: &str| fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let words = |name: &str| {
        field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };

    let disabled = field("enabled").is_some_and(|value| matches!(value, "no" | "false" | "0"));
    if disabled || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    Some(Source {
        uris: words("uris"),
        suites: words("suites"),
        signed_by: field("signed-by").map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_entries_keep_their_key_and_skip_comments_and_source_packages() {
        let text = "# deb http://old x main\n\
                    deb http://mirror/debian bookworm main contrib # ours\n\
                    deb-src http://mirror/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k/a.gpg,/k/b.gpg] http://other/debian trixie main\n";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].uris, ["http://mirror/debian"]);
        assert_eq!(sources[0].suites, ["bookworm"]);
        assert_eq!(sources[0].signed_by, None);
        assert_eq!(sources[1].signed_by.as_deref(), Some("/k/a.gpg /k/b.gpg"));
    }

    #[test]
    fn deb822_stanzas_may_carry_comments_and_embedded_keys_and_be_disabled() {
        let text = "Types: deb deb-src\n# a comment inside\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By:\n -----BEGIN PGP-----\n .\n abc\n\n\
                    Types: deb\nEnabled: no\nURIs: http://off/\nSuites: x\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(sources[0].signed_by.as_deref(), Some("\n -----BEGIN PGP-----\n .\n abc"));
        let written = sources[0].with_suites(&["trixie-backports"]);
        assert_eq!(parse_deb822(&written)[0].signed_by, sources[0].signed_by);
    }
}
