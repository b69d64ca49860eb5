//! The builder of a [`Uffd`]: opening a descriptor, and the handshake about features.

use std::os::fd::{AsFd, OwnedFd};

use crate::open::{self, OpenFlags, OpenWith};
use crate::uffd::Terms;
use crate::{Errno, Error, FeatureFlags, IoctlFlags, Result, Support, Uffd, sys};

/// Builder for a [`Uffd`].
///
/// ```
/// use userfaultfd::{FeatureFlags, UffdBuilder};
///
/// let uffd = UffdBuilder::new()
///     .close_on_exec(true)
///     .non_blocking(true)
///     .require_features(FeatureFlags::MISSING_SHMEM)
///     .request_features(FeatureFlags::THREAD_ID | FeatureFlags::RWP)
///     .create()?;
/// assert!(uffd.features().contains(FeatureFlags::MISSING_SHMEM));
/// println!("got {}", uffd.features());
/// # Ok::<(), userfaultfd::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct UffdBuilder {
    open_with: OpenWith,
    flags: OpenFlags,
    wanted: Wanted,
}

impl Default for UffdBuilder {
    /// Returns the same as [`UffdBuilder::new`].
    fn default() -> Self {
        Self::new()
    }
}

impl UffdBuilder {
    /// Returns a builder with the defaults: [`OpenWith::Auto`], faults from user mode only, blocking, not closed on exec,
    /// no features.
    #[must_use]
    pub fn new() -> Self {
        Self {
            open_with: OpenWith::Auto,
            flags: OpenFlags { user_mode_only: true, ..OpenFlags::default() },
            wanted: Wanted::default(),
        }
    }

    /// Sets whether execve(2) closes the descriptor. The default is `false`.
    #[doc(alias = "O_CLOEXEC")]
    pub fn close_on_exec(&mut self, close_on_exec: bool) -> &mut Self {
        self.flags.close_on_exec = close_on_exec;
        self
    }

    /// Sets whether reading returns at once when there is no event, instead of waiting for one. The default is `false`.
    ///
    /// poll(2) and epoll(7) work only on a non-blocking descriptor; on a blocking one they report an error, which looks like
    /// "readable". So set `true` for an event loop or a task of an async runtime: with `false` the first read without an
    /// event blocks the thread and all that runs on it. [`Uffd::try_read_event`] returns an error instead of blocking.
    #[doc(alias = "O_NONBLOCK")]
    pub fn non_blocking(&mut self, non_blocking: bool) -> &mut Self {
        self.flags.non_blocking = non_blocking;
        self
    }

    /// Sets whether only faults from user mode are delivered. The default is `true`, which needs no right.
    ///
    /// With `true`, a system call on a missing page (such as read(2) into it) fails with `EFAULT`, and KVM guests can't run
    /// on the memory: when a guest meets a missing page, `KVM_RUN` fails with `EFAULT`, or ends with
    /// `KVM_EXIT_INTERNAL_ERROR` (an `InternalError` of VM monitors) where KVM emulates the instruction, without a hint at
    /// the reason. With `false` such faults are delivered, too, which needs access to `/dev/userfaultfd`, `CAP_SYS_PTRACE`,
    /// or the sysctl `vm.unprivileged_userfaultfd=1`.
    ///
    /// Linux before 5.11 doesn't know this restriction, and delivers all faults.
    #[doc(alias = "UFFD_USER_MODE_ONLY")]
    pub fn user_mode_only(&mut self, user_mode_only: bool) -> &mut Self {
        self.flags.user_mode_only = user_mode_only;
        self
    }

    /// Adds required features: [`create`](Self::create) fails without them.
    ///
    /// A kernel that lacks one makes [`create`](Self::create) fail with
    /// [`UnsupportedFeatures`](Error::UnsupportedFeatures), which names it.
    pub fn require_features(&mut self, features: FeatureFlags) -> &mut Self {
        self.wanted.required |= features;
        self
    }

    /// Adds requested features: each is enabled where possible. [`Uffd::features`] returns those that were enabled.
    ///
    /// Features that the kernel lacks are left out without an error, as are `EVENT_FORK` where this process may not use it,
    /// and `RWP_ASYNC` without `RWP`.
    pub fn request_features(&mut self, features: FeatureFlags) -> &mut Self {
        self.wanted.requested |= features;
        self
    }

    /// Adds required operations.
    ///
    /// [`create`](Self::create) checks the operations of the descriptor, [`Uffd::register_with_mode`] those of a range;
    /// both fail with [`UnsupportedIoctls`](Error::UnsupportedIoctls).
    pub fn require_ioctls(&mut self, ioctls: IoctlFlags) -> &mut Self {
        self.wanted.ioctls |= ioctls;
        self
    }

    /// Sets how the descriptor is opened. The default is [`OpenWith::Auto`].
    pub fn open_with(&mut self, open_with: OpenWith) -> &mut Self {
        self.open_with = open_with;
        self
    }

    /// Creates a userfaultfd, and does the handshake about features.
    ///
    /// # Errors
    ///
    /// - [`OpenFailed`](Error::OpenFailed), [`OpenDevUserfaultfd`](Error::OpenDevUserfaultfd): no descriptor could be
    ///   opened.
    /// - [`UnsupportedFeatures`](Error::UnsupportedFeatures): the kernel lacks a required feature.
    /// - [`FeatureNotPermitted`](Error::FeatureNotPermitted): `EVENT_FORK` is required without
    ///   `CAP_SYS_PTRACE`.
    /// - [`FeatureNeeds`](Error::FeatureNeeds): `RWP_ASYNC` is required without `RWP`.
    /// - [`UnsupportedIoctls`](Error::UnsupportedIoctls): a required operation of the descriptor is missing.
    /// - [`SystemError`](Error::SystemError): another errno of `UFFDIO_API`.
    pub fn create(&self) -> Result<Uffd> {
        Ok(self.shake_hands(open::open(self.open_with, self.flags)?)?.made_here())
    }

    /// Creates a userfaultfd like [`create`](Self::create), through an open `/dev/userfaultfd`: for a process that can no
    /// longer open the device, or was passed it.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create). If `device` is something else, [`OpenFailed`](Error::OpenFailed) with `ENOTTY`, or with
    /// the errno of that device.
    ///
    /// ```no_run
    /// use std::fs::File;
    /// use userfaultfd::UffdBuilder;
    ///
    /// let device = File::open("/dev/userfaultfd")?;
    /// // ... drop privileges ...
    /// let uffd = UffdBuilder::new().user_mode_only(false).from_device(&device)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "USERFAULTFD_IOC_NEW")]
    pub fn from_device(&self, device: impl AsFd) -> Result<Uffd> {
        Ok(self.shake_hands(open::open_from(device.as_fd(), self.flags)?)?.made_here())
    }

    /// Does the handshake on a userfaultfd that was created elsewhere. The builder's options about creation have no effect.
    /// On an error the descriptor is closed.
    ///
    /// If the handshake is done already, use `Uffd::from`.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); also [`AlreadyHandshaken`](Error::AlreadyHandshaken) and
    /// [`NotUserfaultfd`](Error::NotUserfaultfd).
    #[doc(alias = "UFFDIO_API")]
    pub fn handshake(&self, fd: OwnedFd) -> Result<Uffd> {
        if !sys::is_userfaultfd(fd.as_fd()) {
            return Err(Error::NotUserfaultfd);
        }
        self.shake_hands(fd)
    }

    /// The flags of userfaultfd(2).
    #[cfg(any(feature = "tracking", feature = "snapshot"))]
    pub(crate) fn creation_flags(&self) -> libc::c_int {
        self.flags.bits()
    }

    fn shake_hands(&self, fd: OwnedFd) -> Result<Uffd> {
        let got = negotiate(self.wanted, |features| api(&fd, features), || self.probe())?;
        Ok(Uffd::new(fd, got))
    }

    /// Probes what the kernel offers, with a descriptor opened as this builder opens it.
    pub(crate) fn probe(&self) -> Result<Support> {
        // The fewest rights: what the kernel offers doesn't depend on this flag.
        let flags = OpenFlags { user_mode_only: true, ..self.flags };
        let fd = open::open(self.open_with, flags)?;
        Ok(api(&fd, FeatureFlags::empty())?)
    }
}

/// Does the handshake. Returns all that the kernel offers, which may be more than was requested.
fn api(fd: &OwnedFd, features: FeatureFlags) -> Result<Support, Errno> {
    let mut arg = sys::uffdio_api { api: sys::UFFD_API, features: features.bits(), ioctls: 0 };
    sys::api(fd.as_fd(), &mut arg)?;
    Ok(Support {
        features: FeatureFlags::from_bits_retain(arg.features),
        ioctls: IoctlFlags::from_bits_retain(arg.ioctls),
    })
}

/// The features and operations that a builder requires and requests.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    required: FeatureFlags,
    requested: FeatureFlags,
    ioctls: IoctlFlags,
}

/// Negotiates with a kernel, which is given by the functions `api` and `probe`.
///
/// With no requested features it does one handshake, for exactly the required ones. A handshake that fails leaves the
/// descriptor unchanged and returns only an errno; one that succeeds can't be repeated. So another descriptor probes
/// what the kernel offers, before a handshake about features that it may lack, and after a refusal.
fn negotiate(
    wanted: Wanted,
    api: impl Fn(FeatureFlags) -> Result<Support, Errno>,
    probe: impl Fn() -> Result<Support>,
) -> Result<Terms> {
    let Wanted { required, requested, .. } = wanted;
    let mut ask = required;
    if !required.contains(requested) {
        ask |= requested & probe()?.features;
        if !ask.contains(FeatureFlags::RWP) && !required.contains(FeatureFlags::RWP_ASYNC) {
            ask.remove(FeatureFlags::RWP_ASYNC);
        }
    }
    let fork = FeatureFlags::EVENT_FORK;
    let answer = match api(ask) {
        Err(Errno::EPERM) if ask.contains(fork) && !required.contains(fork) => {
            ask.remove(fork);
            api(ask)
        }
        answer => answer,
    };
    let offered = answer.map_err(|errno| refusal(errno, ask, &probe))?;
    // Some kernels (6.1 to 6.1.25) accept a feature that they don't have.
    let missing = ask.difference(offered.features);
    if !missing.is_empty() {
        return Err(Error::UnsupportedFeatures { missing, supported: offered.features });
    }
    if !offered.ioctls.contains(wanted.ioctls & IoctlFlags::OF_DESCRIPTOR) {
        return Err(Error::UnsupportedIoctls(offered.ioctls));
    }
    if ask.contains(FeatureFlags::WP_ASYNC) {
        ask |= FeatureFlags::WP_UNPOPULATED & offered.features;
    }
    let got = Support { features: ask, ioctls: offered.ioctls };
    Ok(Terms::negotiated(got, wanted.ioctls.difference(IoctlFlags::OF_DESCRIPTOR)))
}

/// Why the handshake was refused.
fn refusal(errno: Errno, asked: FeatureFlags, probe: impl Fn() -> Result<Support>) -> Error {
    match errno {
        Errno::EPERM if asked.contains(FeatureFlags::EVENT_FORK) => {
            Error::FeatureNotPermitted(FeatureFlags::EVENT_FORK)
        }
        Errno::EINVAL => match probe() {
            Ok(Support { features: supported, .. }) => {
                let missing = asked.difference(supported);
                if !missing.is_empty() {
                    Error::UnsupportedFeatures { missing, supported }
                } else if asked.contains(FeatureFlags::RWP_ASYNC) && !asked.contains(FeatureFlags::RWP) {
                    Error::FeatureNeeds { feature: FeatureFlags::RWP_ASYNC, needs: FeatureFlags::RWP }
                } else {
                    Error::AlreadyHandshaken
                }
            }
            // There is no second descriptor, so the reason can't be told apart.
            Err(_) => Error::SystemError(errno),
        },
        errno => Error::SystemError(errno),
    }
}

impl Support {
    /// Asks the kernel what it offers, with a descriptor for faults from user mode, which needs the fewest rights, and
    /// which is closed again.
    ///
    /// # Errors
    ///
    /// [`OpenFailed`](crate::Error::OpenFailed): no descriptor could be opened; its [`reason`](crate::OpenFailure::reason)
    /// distinguishes "not built in" and "not permitted".
    pub fn probe() -> Result<Self> {
        UffdBuilder::new().close_on_exec(true).probe()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A kernel: what it offers, whether it checks features, whether it grants EVENT_FORK.
    #[derive(Clone, Copy)]
    struct Kernel {
        features: FeatureFlags,
        checks: bool,
        grants_fork: bool,
    }

    const LINUX_5_10: Kernel =
        Kernel { features: FeatureFlags::from_bits_retain(0x1ff), checks: true, grants_fork: true };
    const LINUX_7_3: Kernel = Kernel { features: FeatureFlags::from_bits_retain(0x7ffff), ..LINUX_5_10 };

    impl Kernel {
        fn offer(self) -> Support {
            let set_mode = self.features.contains(FeatureFlags::RWP);
            let ioctls = IoctlFlags::API | IoctlFlags::REGISTER | IoctlFlags::UNREGISTER;
            Support {
                features: self.features,
                ioctls: if set_mode { ioctls | IoctlFlags::SET_MODE } else { ioctls },
            }
        }

        /// The checks of UFFDIO_API, in the kernel's order.
        fn api(self, features: FeatureFlags) -> Result<Support, Errno> {
            let rwp_alone =
                features.contains(FeatureFlags::RWP_ASYNC) && !features.contains(FeatureFlags::RWP);
            if features.contains(FeatureFlags::EVENT_FORK) && !self.grants_fork {
                Err(Errno::EPERM)
            } else if self.checks && (rwp_alone || !self.features.contains(features)) {
                Err(Errno::EINVAL)
            } else {
                Ok(self.offer())
            }
        }

        fn negotiate(self, required: FeatureFlags, requested: FeatureFlags) -> Result<FeatureFlags> {
            let wanted = Wanted { required, requested, ..Wanted::default() };
            let terms = negotiate(wanted, |features| self.api(features), || Ok(self.offer()))?;
            Ok(terms.support().expect("the builder knows its terms").features)
        }
    }

    const NONE: FeatureFlags = FeatureFlags::empty();

    #[test]
    fn handshake_requests_exactly_required_features() {
        crate::support::require!();
        let asked = Cell::new(None);
        let wanted = Wanted { required: FeatureFlags::THREAD_ID, ..Wanted::default() };
        let api = |features| {
            assert_eq!(asked.replace(Some(features)), None, "asked twice");
            LINUX_7_3.api(features)
        };
        negotiate(wanted, api, || panic!("probed")).unwrap();
        assert_eq!(asked.get(), Some(FeatureFlags::THREAD_ID));
    }

    #[test]
    fn required_feature_that_is_missing_is_named() {
        crate::support::require!();
        let required = FeatureFlags::THREAD_ID | FeatureFlags::MOVE | FeatureFlags::from_bits_retain(1 << 40);
        let error = LINUX_5_10.negotiate(required, NONE).unwrap_err();
        let Error::UnsupportedFeatures { missing, supported } = error else { panic!("{error}") };
        assert_eq!(missing, FeatureFlags::MOVE | FeatureFlags::from_bits_retain(1 << 40));
        assert_eq!(supported, LINUX_5_10.features);
    }

    #[test]
    fn ignored_unknown_features_count_as_missing() {
        crate::support::require!();
        let sloppy = Kernel { checks: false, ..LINUX_5_10 };
        let error = sloppy.negotiate(FeatureFlags::POISON, NONE).unwrap_err();
        assert!(matches!(error, Error::UnsupportedFeatures { missing: FeatureFlags::POISON, .. }), "{error}");
    }

    #[test]
    fn requested_features_are_taken_where_there_are() {
        crate::support::require!();
        let both = FeatureFlags::THREAD_ID | FeatureFlags::MOVE;
        assert_eq!(LINUX_5_10.negotiate(NONE, both).unwrap(), FeatureFlags::THREAD_ID);
        assert_eq!(LINUX_7_3.negotiate(NONE, both).unwrap(), both);
        assert_eq!(LINUX_7_3.negotiate(FeatureFlags::SIGBUS, both).unwrap(), both | FeatureFlags::SIGBUS);
    }

    #[test]
    fn fork_events_without_right_are_dropped_or_an_error() {
        crate::support::require!();
        let user = Kernel { grants_fork: false, ..LINUX_7_3 };
        let both = FeatureFlags::EVENT_FORK | FeatureFlags::EVENT_REMAP;
        assert_eq!(user.negotiate(NONE, both).unwrap(), FeatureFlags::EVENT_REMAP);
        let error = user.negotiate(both, NONE).unwrap_err();
        assert!(matches!(error, Error::FeatureNotPermitted(FeatureFlags::EVENT_FORK)), "{error}");
    }

    #[test]
    fn async_rwp_requires_rwp() {
        crate::support::require!();
        let error = LINUX_7_3.negotiate(FeatureFlags::RWP_ASYNC, NONE).unwrap_err();
        assert!(matches!(error, Error::FeatureNeeds { needs: FeatureFlags::RWP, .. }), "{error}");
        assert_eq!(LINUX_7_3.negotiate(NONE, FeatureFlags::RWP_ASYNC).unwrap(), NONE);
        let both = FeatureFlags::RWP_ASYNC | FeatureFlags::RWP;
        assert_eq!(LINUX_7_3.negotiate(FeatureFlags::RWP, both).unwrap(), both);
        assert_eq!(LINUX_5_10.negotiate(NONE, both).unwrap(), NONE);
    }

    #[test]
    fn wp_async_adds_wp_unpopulated() {
        crate::support::require!();
        let got = LINUX_7_3.negotiate(FeatureFlags::WP_ASYNC, NONE).unwrap();
        assert_eq!(got, FeatureFlags::WP_ASYNC | FeatureFlags::WP_UNPOPULATED);
        // Where it isn't offered it isn't there, whatever else is.
        let without =
            Kernel { features: LINUX_7_3.features.difference(FeatureFlags::WP_UNPOPULATED), ..LINUX_7_3 };
        assert_eq!(without.negotiate(FeatureFlags::WP_ASYNC, NONE).unwrap(), FeatureFlags::WP_ASYNC);
    }

    #[test]
    fn second_handshake_differs_from_missing_feature() {
        crate::support::require!();
        let wanted = Wanted { required: FeatureFlags::MOVE, ..Wanted::default() };
        let error = negotiate(wanted, |_| Err(Errno::EINVAL), || Ok(LINUX_7_3.offer())).unwrap_err();
        assert!(matches!(error, Error::AlreadyHandshaken), "{error}");
    }

    #[test]
    fn required_ioctls_are_checked_where_reported() {
        crate::support::require!();
        let ask = |kernel: Kernel, ioctls| {
            let wanted = Wanted { ioctls, ..Wanted::default() };
            negotiate(wanted, |features| kernel.api(features), || Ok(kernel.offer()))
        };
        let terms = ask(LINUX_5_10, IoctlFlags::COPY | IoctlFlags::REGISTER).unwrap();
        assert_eq!(terms.range_ioctls, IoctlFlags::COPY);
        assert!(matches!(ask(LINUX_5_10, IoctlFlags::SET_MODE), Err(Error::UnsupportedIoctls(_))));
        assert!(ask(LINUX_7_3, IoctlFlags::SET_MODE).is_ok());
    }
}
