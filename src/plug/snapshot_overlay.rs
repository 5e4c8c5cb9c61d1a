//! What an overlay mount needs to be told: its lower directories, nearest first, and the rest.
//!
//! Pure apart from one look at the running kernel. Refuses a path that would split an option
//! instead of quoting it: we name all our directories ourselves.

use std::path::{Path, PathBuf};

use crate::config::OVERLAY_LOWERS_MAX;
use crate::error::{Error, Result};

/// The parts of an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Read-only directories, the topmost layer first; at least one.
    pub lowers: Vec<PathBuf>,
    /// Where changes go and the overlay's own scratch directory; a read-only overlay has none.
    pub upper: Option<(PathBuf, PathBuf)>,
}

impl Overlay {
    /// The options of mount(2), one each. `index_off` says that this kernel knows `index=`.
    ///
    /// With the index on, a second overlay over the same upper directory is refused; a container
    /// service mounts an upper a second time while the first mount is still going away.
    pub fn options(&self, index_off: bool) -> Result<Vec<String>> {
        if self.lowers.len() > OVERLAY_LOWERS_MAX {
            return Err(Error::Unsupported(format!(
                "an image of {} layers; overlay takes {OVERLAY_LOWERS_MAX} at most",
                self.lowers.len()
            )));
        }
        let mut options = Vec::new();
        if index_off {
            options.push("index=off".to_owned());
        }
        if let Some((upper, work)) = &self.upper {
            options.push(format!("workdir={}", plain(work)?));
            options.push(format!("upperdir={}", plain(upper)?));
        }
        let lowers = self.lowers.iter().map(|lower| plain(lower)).collect::<Result<Vec<_>>>()?;
        options.push(format!("lowerdir={}", lowers.join(":")));
        Ok(options)
    }
}

/// Whether this kernel's overlay has the `index` option.
pub fn kernel_has_index() -> bool {
    Path::new("/sys/module/overlay/parameters/index").exists()
}

fn plain(path: &Path) -> Result<&str> {
    let text = path.to_str().filter(|text| !text.contains([':', ',', '\\', '\n']));
    text.ok_or_else(|| {
        Error::Unsupported(format!(
            "{}: overlay needs paths without : , \\ and in UTF-8; choose another directory",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_layer_comes_first() {
        let overlay = Overlay {
            lowers: vec!["/s/3/fs".into(), "/s/1/fs".into()],
            upper: Some(("/s/4/fs".into(), "/s/4/work".into())),
        };
        assert_eq!(
            overlay.options(true).unwrap(),
            ["index=off", "workdir=/s/4/work", "upperdir=/s/4/fs", "lowerdir=/s/3/fs:/s/1/fs"]
        );
        let view = Overlay { upper: None, ..overlay };
        assert_eq!(view.options(false).unwrap(), ["lowerdir=/s/3/fs:/s/1/fs"]);
    }

    #[test]
    fn paths_that_would_split_an_option_are_refused() {
        for path in ["/a:b", "/a,b", "/a\\b", "/a\nb"] {
            let overlay = Overlay { lowers: vec![path.into()], upper: None };
            assert!(overlay.options(false).is_err(), "{path}");
        }
    }

    #[test]
    fn more_layers_than_the_kernel_takes_are_refused() {
        let of = |count| Overlay { lowers: vec!["/a".into(); count], upper: None }.options(false);
        assert!(of(OVERLAY_LOWERS_MAX).is_ok());
        assert!(of(OVERLAY_LOWERS_MAX + 1).is_err());
    }
}
