/* What the bindings are made from, and why each header is needed. */

#include <linux/ioctl.h>	/* _IO, _IOR, _IOW, _IOWR: userfaultfd.h uses them without including them */
#include <linux/userfaultfd.h>	/* the interface itself */
#include <linux/fs.h>		/* PAGEMAP_SCAN, which says what asynchronous protection has found */

#if __has_include(<linux/version.h>)
#include <linux/version.h>	/* whose headers these are; not bound */
#endif
